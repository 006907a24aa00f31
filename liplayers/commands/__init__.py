"""The commands as they are started: hydra, `--help`, and every error as one line.

Nothing here imports torch, which takes seconds, before there is something to do; what is done is in `cli`.
"""

from liplayers.commands.entry import audit_command as audit_command
from liplayers.commands.entry import certify_command as certify_command
from liplayers.commands.entry import front_command as front_command
from liplayers.commands.entry import train_command as train_command
