"""Every rule once more, in NumPy float64, transcribed from its paper: what `test_reference.py` holds the rules against.

A reference is a generator. It is sent `(g, p)`, the gradient and the parameter, and yields its result; its local
variables are its memory. Those of one array are lifted to trees by `each`, which knows nothing of the package.
A hyperparameter is a number, or a function of the number of finished updates.
"""
