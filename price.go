package main

import (
	"encoding/json"
	"errors"
	"strconv"
	"strings"
)

// Price is an amount in whole cents. It is never a float between the wire and
// the database, so every amount is exact.
type Price int64

// maxPrice is the largest amount that a product may cost: 9,999,999,999.99.
const maxPrice Price = 9_999_999_999_99

// The ways in which a price can be wrong, worded for the client who sent it.
var (
	errPriceSyntax    = errors.New("must be a number or a decimal string such as \"89.90\"")
	errPriceRange     = errors.New("must be from 0 to " + maxPrice.String())
	errPricePrecision = errors.New("must have at most two decimals")
)

// parsePrice reads a decimal such as 89.9, 89.90 or, since a JSON number may
// be written so, 8.99e1. What counts is the value: 1.500 has one decimal.
func parsePrice(s string) (Price, error) {
	digits, exponent, err := splitDecimal(s)
	if err != nil {
		return 0, err
	}
	negative := strings.HasPrefix(digits, "-")
	digits = strings.TrimLeft(strings.TrimPrefix(digits, "-"), "0")
	if digits == "" {
		return 0, nil
	}
	for strings.HasSuffix(digits, "0") {
		digits = digits[:len(digits)-1]
		exponent++
	}
	switch {
	case negative:
		return 0, errPriceRange
	case exponent < -2:
		return 0, errPricePrecision
	case len(digits)+exponent > 10: // whole digits, of which maxPrice has ten
		return 0, errPriceRange
	}
	cents, err := strconv.ParseInt(digits+strings.Repeat("0", exponent+2), 10, 64)
	if err != nil {
		return 0, errPriceSyntax
	}
	return Price(cents), nil
}

// splitDecimal takes a JSON number (RFC 8259, section 6) apart into its sign
// and digits without the point, and the power of ten that they are to be
// multiplied by.
func splitDecimal(s string) (digits string, exponent int, err error) {
	mantissa, power, hasPower := strings.Cut(strings.ToLower(s), "e")
	whole, fraction, hasPoint := strings.Cut(mantissa, ".")
	unsigned := strings.TrimPrefix(whole, "-")
	leadingZero := len(unsigned) > 1 && unsigned[0] == '0'
	if !isDigits(unsigned) || leadingZero || hasPoint && !isDigits(fraction) {
		return "", 0, errPriceSyntax
	}
	if hasPower {
		sign := strings.TrimLeft(power, "+-")
		if !isDigits(sign) || len(power)-len(sign) > 1 {
			return "", 0, errPriceSyntax
		}
		// So far out the sign alone decides: Atoi clamps to the range of int, and
		// this further, so that the sums below do not overflow.
		exponent, _ = strconv.Atoi(power)
		exponent = min(max(exponent, -1<<30), 1<<30)
	}
	return whole + fraction, exponent - len(fraction), nil
}

func isDigits(s string) bool {
	for i := range len(s) {
		if s[i] < '0' || s[i] > '9' {
			return false
		}
	}
	return s != ""
}

// UnmarshalJSON takes a JSON number or a string that holds a plain decimal.
func (p *Price) UnmarshalJSON(data []byte) error {
	s := string(data)
	if strings.HasPrefix(s, `"`) {
		if err := json.Unmarshal(data, &s); err != nil || strings.ContainsAny(s, "eE") {
			return errPriceSyntax
		}
	}
	price, err := parsePrice(s)
	if err != nil {
		return err
	}
	*p = price
	return nil
}

// MarshalJSON writes a JSON number with two decimals.
func (p Price) MarshalJSON() ([]byte, error) { return p.append(nil), nil }

func (p Price) String() string { return string(p.append(nil)) }

func (p Price) append(to []byte) []byte {
	to = append(strconv.AppendInt(to, int64(p/100), 10), '.')
	return append(to, byte('0'+p/10%10), byte('0'+p%10))
}
