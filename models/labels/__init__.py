"""Label lists of ImageNet-1k and COCO."""
