"""Conversion of published weights to jaxdiff's own layout: `python -m weights_convert WHAT SOURCE OUT`."""
