"""How array product, ADC and sum are computed: the definition and faster programs, behind one contract."""
