"""The references: numpy only, float64, written from the equations; nothing here imports subquad.

dtype=np.float32 evaluates the same formula in float32: the plain result that the error budget of a kernel is made of.
"""
