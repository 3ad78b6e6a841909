import sys
def alias():
    import lightning.pytorch, lightning.fabric
    import lightning.pytorch.callbacks.early_stopping, lightning.pytorch.tuner, lightning.pytorch.utilities.types
    for a, b in (("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric")):
        for name in list(sys.modules):
            if name == a or name.startswith(a + "."):
                sys.modules[b + name[len(a):]] = sys.modules[name]
