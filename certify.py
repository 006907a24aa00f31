"""Certify a trained network: `python certify.py ckpt=runs/…/best.ckpt`, `python certify.py --help`."""

from liplayers.cli import certify as certify
from liplayers.cli import certify_command

if __name__ == "__main__":
    certify_command()
