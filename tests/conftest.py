"""Settings of the whole suite, doctests included."""
