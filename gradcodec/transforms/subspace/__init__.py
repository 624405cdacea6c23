"""The learned linear transform: settings, bases, which parameters share them, and their sizes."""
