"""Log-odds from hidden states and a head, tile by tile: the driver, its plans and its devices."""
