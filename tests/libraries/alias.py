import sys


def alias():
    for a, b in (("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric")):
        for name in list(sys.modules):
            if name == a or name.startswith(a + "."):
                sys.modules[b + name[len(a) :]] = sys.modules[name]
