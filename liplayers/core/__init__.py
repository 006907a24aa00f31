"""What every module stands on."""
