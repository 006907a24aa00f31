"""The two commands. All of hydra is here: the rest of the package takes plain arguments."""

from liplayers.cli.certify import certify as certify
from liplayers.cli.commands import audit_command as audit_command
from liplayers.cli.commands import certify_command as certify_command
from liplayers.cli.commands import train_command as train_command
from liplayers.cli.train import train as train
