"""Train a certified network: `python train.py experiment=digits`, `python train.py --help`."""

if __name__ == "__main__":
    from liplayers.commands import train_command

    train_command()
else:
    from liplayers.cli import train as train
