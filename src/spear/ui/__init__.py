"""The page for people: the simulator or a photo, SPEAR-VLM's boxes on it, SPEAR-1's next actions in
3D.
"""
