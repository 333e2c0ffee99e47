"""The drift monitor: it notices a robot that sends or does something else than the training data.

Exchanged colors or cameras, an image upside down, another frame, another quaternion order or an
inverted gripper all make observations that pass every check of form. The robot then moves smoothly
to the wrong place.
"""
