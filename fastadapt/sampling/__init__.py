"""From a row of logits to the next token: edits, filters, the draw, scores of given tokens."""
