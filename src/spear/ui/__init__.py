"""The page in the browser. It shows the simulator, a recorded episode or a photo, with the boxes of
SPEAR-VLM, and the next actions of SPEAR-1 in 3D.
"""
