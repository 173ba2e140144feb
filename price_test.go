package main

import (
	"encoding/json"
	"errors"
	"math/big"
	"testing"
)

func TestPriceIsReadExactly(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]Price{
		`0`: 0, `-0`: 0, `0.00`: 0, `0e999999999999`: 0,
		`1`: 100, `1.5`: 150, `1.50`: 150, `1.500`: 150, `89.90`: 8990, `0.01`: 1, `0.29`: 29,
		`1e2`: 100_00, `1.5E1`: 15_00, `150e-1`: 15_00, `1e+3`: 1000_00,
		`9999999999.99`: maxPrice, `9.99999999999e9`: maxPrice, `10000e-6`: 1,
		`"89.90"`: 8990, `"0"`: 0, `"4503599627.37"`: 450359962737, `"1\u0030"`: 10_00,
	} {
		var got Price
		if err := json.Unmarshal([]byte(in), &got); err != nil || got != want {
			t.Errorf("%s = %d, %v; want %d cents", in, got, err, want)
		}
	}
}

func TestPriceRefusesWhatItCannotHold(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]error{
		`-0.01`: errPriceRange, `-1`: errPriceRange, `10000000000`: errPriceRange, `1e10`: errPriceRange,
		`1e999999999999999999999`: errPriceRange, `9999999999.995`: errPricePrecision,
		`0.001`: errPricePrecision, `1.999`: errPricePrecision, `1e-3`: errPricePrecision,
		`1e-99999999999999999999`: errPricePrecision,
		`"1e2"`:                   errPriceSyntax, `"1,50"`: errPriceSyntax, `"€5"`: errPriceSyntax, `""`: errPriceSyntax,
		`" 1"`: errPriceSyntax, `"+1"`: errPriceSyntax, `".5"`: errPriceSyntax, `"5."`: errPriceSyntax, `"0x10"`: errPriceSyntax,
		`"01"`: errPriceSyntax, `"NaN"`: errPriceSyntax, `true`: errPriceSyntax, `[]`: errPriceSyntax,
	} {
		var got Price
		if err := json.Unmarshal([]byte(in), &got); !errors.Is(err, want) {
			t.Errorf("%s = %d, %v; want error %q", in, got, err, want)
		}
	}
}

// FuzzPrice holds parsePrice against exact rational arithmetic and against its
// own output.
func FuzzPrice(f *testing.F) {
	for _, seed := range []string{"0", "89.90", "1e2", "-0", "1.500", "9999999999.99", "1e-2", "00", "1e", "-"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, s string) {
		price, err := parsePrice(s)
		if err != nil {
			return
		}
		if price < 0 || price > maxPrice {
			t.Fatalf("%q gives %d, out of range", s, price)
		}
		if again, err := parsePrice(price.String()); err != nil || again != price {
			t.Fatalf("%q gives %s, which reads as %s, %v", s, price, again, err)
		}
		if len(s) > 100 {
			return // an exponent that big.Rat would spend memory on
		}
		if _, exponent, _ := splitDecimal(s); exponent < -1000 || exponent > 1000 {
			return
		}
		exact, ok := new(big.Rat).SetString(s)
		if !ok || exact.Cmp(big.NewRat(int64(price), 100)) != 0 {
			t.Fatalf("%q gives %s, not the exact value", s, price)
		}
	})
}
