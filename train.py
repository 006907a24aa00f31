"""Train a certified network: `python train.py experiment=digits`, `python train.py --help`."""

from liplayers.cli import train as train
from liplayers.cli import train_command

if __name__ == "__main__":
    train_command()
