"""Where assignments run: in this process, on Ray, or (later) at other organisations' sites."""
