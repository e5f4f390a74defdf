"""Published weights: read their files safely, recognise their layouts, and convert them to runs (`vitrine import`)."""
