"""From layers with parametrisations to plain weights, and from those to files."""

from liplayers.export.formats import export_onnx as export_onnx
from liplayers.export.formats import export_program as export_program
from liplayers.export.formats import export_safetensors as export_safetensors
from liplayers.export.freeze import freeze as freeze
