"""From outputs and bounds to radii, reports and plots."""

from liplayers.certification.certificates import Certificates as Certificates
from liplayers.certification.evaluate import certify as certify
from liplayers.certification.network import CertifiedNetwork as CertifiedNetwork
from liplayers.certification.radius import certified_accuracy as certified_accuracy
from liplayers.certification.radius import certified_radius as certified_radius
from liplayers.certification.radius import flip_radii as flip_radii
from liplayers.certification.radius import in_norm as in_norm
from liplayers.certification.radius import label_radius as label_radius
from liplayers.certification.radius import parse_radius as parse_radius
from liplayers.certification.radius import slack_radius as slack_radius
from liplayers.certification.radius import target_radii as target_radii
from liplayers.certification.tasks import TASKS as TASKS
from liplayers.certification.tasks import Binary as Binary
from liplayers.certification.tasks import Classification as Classification
from liplayers.certification.tasks import Conformal as Conformal
from liplayers.certification.tasks import MultiLabel as MultiLabel
from liplayers.certification.tasks import Regression as Regression
from liplayers.certification.tasks import Segmentation as Segmentation
from liplayers.certification.tasks import Targeted as Targeted
from liplayers.certification.tasks import Task as Task
from liplayers.certification.tasks import TopK as TopK
