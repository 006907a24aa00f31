"""Certify a trained network: `python certify.py ckpt=runs/…/best.ckpt`, `python certify.py --help`."""

if __name__ == "__main__":
    from liplayers.commands import certify_command

    certify_command()
else:
    from liplayers.cli import certify as certify
