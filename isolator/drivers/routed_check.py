def differences(node, wiring): return []
