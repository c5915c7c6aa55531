"""Verbs that predict a run before it takes place."""
