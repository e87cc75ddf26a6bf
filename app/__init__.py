"""What several pages share: the open workbench, pickers, job panels, drawings and charts."""
