"""Where gradients may land: blocks, masks, routes and views."""
