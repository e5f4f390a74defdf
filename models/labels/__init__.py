"""The label lists that come with Vitrine: ImageNet-1k and COCO."""
