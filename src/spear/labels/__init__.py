"""From images to 3D-labelled images to questions: detect, segment, point map, box, ask, store."""
