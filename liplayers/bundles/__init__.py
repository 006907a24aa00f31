"""Trained networks as folders that anyone can load, and verify without trusting whoever made them.

A bundle is six files: config.json (how the network is built, in names and plain values), model.safetensors (its raw and
its frozen weights), report.json and certificates.csv (what `certify.py` proved of it), README.md (a card), and
manifest.json (the hashes of the others). Nothing in it is code, and nothing is unpickled.
"""

from liplayers.bundles.bundle import Bundle as Bundle
from liplayers.bundles.bundle import load_bundle as load_bundle
from liplayers.bundles.bundle import load_pretrained as load_pretrained
from liplayers.bundles.saving import save_bundle as save_bundle
