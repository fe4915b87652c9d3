"""Forecasts: what a run will need of a card, of its host and of time, by formula, and which settings would fit."""
