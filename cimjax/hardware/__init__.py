"""What goes into the chip, and what it costs there."""
