"""Certified classifiers of several layer families at one parameter budget, on the UCI sets of Klambauer et al. 2017."""
