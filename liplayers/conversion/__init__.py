"""Models of others, converted into certifiable ones."""

from liplayers.conversion.convert import convert as convert
from liplayers.conversion.merging import ConvexSum as ConvexSum
from liplayers.conversion.merging import ScaledCat as ScaledCat
from liplayers.conversion.program import Rewritten as Rewritten
from liplayers.conversion.report import Conversion as Conversion
from liplayers.conversion.report import Report as Report
from liplayers.conversion.report import Row as Row
from liplayers.conversion.swaps import from_torch as from_torch
