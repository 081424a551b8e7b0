// nnp says who it runs as. It is installed with the set-user-ID bit, which no_new_privs takes the effect from.
package main

import (
	"fmt"
	"os"
)

func main() {
	fmt.Println("Effective uid:", os.Geteuid())
}
