"""A head's product whose logits are summed where they are made."""
