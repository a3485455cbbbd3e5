"""The nodes of LCM Suite for ComfyUI (V3 schema). A node translates; the work is done in lcm_core and trainer."""
