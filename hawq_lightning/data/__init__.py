"""DataModules: digits, image folders, COCO, generated miniatures."""
