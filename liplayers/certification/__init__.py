"""From logits and bounds to radii, reports and plots."""

from liplayers.certification.evaluate import Certificates as Certificates
from liplayers.certification.evaluate import certify as certify
from liplayers.certification.network import CertifiedNetwork as CertifiedNetwork
from liplayers.certification.radius import certified_accuracy as certified_accuracy
from liplayers.certification.radius import certified_radius as certified_radius
from liplayers.certification.radius import parse_radius as parse_radius
