"""Forecasts of what a run needs of a card, of its host and of time, by formula, and which settings would fit."""
