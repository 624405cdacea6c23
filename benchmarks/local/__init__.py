"""Pretraining by ranks that exchange seldom."""
