"""Record other trainers while they train, inside the user's own script."""
