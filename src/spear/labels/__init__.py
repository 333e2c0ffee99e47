"""From images to 3D-labeled images to questions: detect, segment, point map, box, ask, store."""
