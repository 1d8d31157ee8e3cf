"""A small shop: orders are placed, paid, cancelled and returned; goods are delivered; the till in the store sells too."""
