"""What a run is worth: metrics by free-running decoding, and the gate that decides on them."""
