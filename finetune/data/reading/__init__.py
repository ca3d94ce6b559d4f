"""From files of any accepted shape to conversations."""
