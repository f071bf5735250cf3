"""Log-odds from hidden states and a head, tile by tile: driver, plans and devices."""
