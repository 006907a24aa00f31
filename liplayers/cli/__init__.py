"""What the commands do. All of hydra is here and in `commands`: the rest of the package takes plain arguments."""

from liplayers.commands import audit_command as audit_command
from liplayers.commands import certify_command as certify_command
from liplayers.commands import train_command as train_command
from liplayers.extras import extra

with extra("train"):
    from liplayers.cli.certify import certify as certify
    from liplayers.cli.train import train as train
