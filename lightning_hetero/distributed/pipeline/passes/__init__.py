"""What the passes of a stage need: channels to other ranks, and gradients that are put off."""
