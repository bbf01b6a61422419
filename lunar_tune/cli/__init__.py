"""What the commands share: options and errors."""
