"""From recordings of a real engine to a profile that `llmsim` can replay with, and back: fit, then check the fit."""
